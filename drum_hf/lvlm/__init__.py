"""Large vision-language models: how they are prompted, run, and their scores kept."""
