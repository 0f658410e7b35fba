"""Rooms of the library measured against their peers."""
