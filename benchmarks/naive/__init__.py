"""Baselines on plain transformers: RAIN with the published code's caching habits, RAIN as a competent user writes it, sampling."""
