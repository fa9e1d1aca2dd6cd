"""Speed of artifacts and settings beside each other: each in a process of its own, measured in turns, and reported."""
