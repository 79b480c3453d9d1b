"""From rewards to log-likelihoods of feedback: one file for each kind of feedback or loss."""
