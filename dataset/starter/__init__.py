"""The built-in world: a program with fact tables and templates that writes a small bilingual corpus in seconds."""
