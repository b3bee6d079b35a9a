"""What is done to a stream: edits as values, the four variants, directions and their controls, maps between streams."""
