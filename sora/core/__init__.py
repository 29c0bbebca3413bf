"""What every room builds on: errors, records, files, processes, provenance. Imports nothing of Sora but itself."""
