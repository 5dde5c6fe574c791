"""Modules that gpt.py and the scripts import where needed and that import no other project file."""
