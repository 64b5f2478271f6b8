"""A run: its options, folder, manifest and processes; what `analyze`, `verify` and later commands share."""
