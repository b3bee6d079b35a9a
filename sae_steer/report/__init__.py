"""All records of a run as one offline page and its charts. Chooses and formats; no number is computed here."""
