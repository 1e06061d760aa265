"""Methods that MoDE is compared with, one file each."""
