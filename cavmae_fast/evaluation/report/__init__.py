"""The report page: one file in which one hears and sees what was found, without a network."""
