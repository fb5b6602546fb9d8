"""Speed of the layers beside their peers', measured in one run: ``make bench``."""
