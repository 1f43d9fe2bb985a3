"""What the pixels of a picture file mean, for those who learn from it and those who serve it. Needs Pillow and numpy alone."""
