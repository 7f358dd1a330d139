"""Objects that a FineTuneJob should have, built purely: no clock, no cluster, no environment."""
