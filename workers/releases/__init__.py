"""What leaves: the files of a release, its manifest, and the sinks that publish it."""
