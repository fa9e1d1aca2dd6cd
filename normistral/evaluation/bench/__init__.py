"""Speed of artifacts and settings side by side: each in its own process, measured interleaved, and reported."""
