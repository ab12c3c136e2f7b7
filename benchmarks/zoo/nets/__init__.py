"The zoo's nets, by what they read."
