"""Settings: frozen, checked dataclasses, their composition from YAML and overrides, and the identity of a run."""
