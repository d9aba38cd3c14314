"""Implement the commands, one module per subcommand: the only place where configuration meets objects."""
