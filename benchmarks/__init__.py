"""What vitprobe is measured by: scripts that make the tables of docs/."""
