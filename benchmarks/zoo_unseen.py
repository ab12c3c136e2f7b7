"The zoo's unseen half."
