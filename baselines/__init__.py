"""Every method that MoDE is compared with, one file each."""
