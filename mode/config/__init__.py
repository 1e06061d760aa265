"""Settings: plain, frozen, checked types, and how they are composed from YAML and overrides."""
