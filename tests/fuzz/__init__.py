"""What must hold for any file: promises, and mutated cases that try to break them; see engine.py.

``python -m tests.fuzz`` runs them for as long as one likes.
"""
