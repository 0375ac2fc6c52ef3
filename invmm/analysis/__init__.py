"""Looking at what a run left on disk: statistics, pictures, tables. Reads artifacts only."""
