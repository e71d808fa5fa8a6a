"""What a run costs: jobs, seconds, gigabytes."""
