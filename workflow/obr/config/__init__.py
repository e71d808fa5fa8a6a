"""What is asked for: recipes, the config of the workflow, sizes in config.json. No torch."""
