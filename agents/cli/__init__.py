"""The command line. Modules here import only what every command needs; the rest inside the commands."""
