"""One module a subcommand: the only place where configuration meets objects."""
