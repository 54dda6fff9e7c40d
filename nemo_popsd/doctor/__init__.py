"""`popsd doctor`: checks whether an environment and a machine meet the needs of a run. Needs no installed package."""
