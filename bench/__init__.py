"""`python -m bench`: parity, times, memory and the distance to the floor of every engine on this machine."""
