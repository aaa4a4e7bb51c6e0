"""What the operating system and the other processes offer: ranks, signals, files, memory, the terminal."""
