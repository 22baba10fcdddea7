"""Recipes, processes and the command line: how a user starts what the other packages do."""
