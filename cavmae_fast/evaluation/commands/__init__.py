"""The commands of evaluation: options, and what is printed when they are done."""
