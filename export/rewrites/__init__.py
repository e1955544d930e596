"""One change to an exported graph a file. Each tells how often it found something to change."""
