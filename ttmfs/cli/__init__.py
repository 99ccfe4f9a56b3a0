"""The commands for people: ttmfs, the helper of mount(8), and the rescue program."""
