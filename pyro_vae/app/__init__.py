"""The command line: names, settings, commands, and the pages they write."""
