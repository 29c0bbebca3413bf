"""What keeps a project running: servers, locks, doctor, garbage collection, backup."""
