"""What every room stands on: errors, records, files, processes, provenance. Imports nothing of Sora but itself."""
