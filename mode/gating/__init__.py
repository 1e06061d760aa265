"""Gates and routers: what weighs branches, token by token."""
