"""From a dataset's files to token ids, and which of them are learnt."""
