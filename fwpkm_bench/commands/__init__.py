"""The commands, one file a room; what is heavy is imported inside them, so that --help is instant."""
