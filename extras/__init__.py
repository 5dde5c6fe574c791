"""Modules that gpt.py and the scripts import where needed; they import no other project file."""
