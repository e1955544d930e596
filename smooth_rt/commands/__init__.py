"""The commands of `smooth-rt`, by subject. Each parses, calls, and returns what is to be printed; none imports torch
before it runs."""
