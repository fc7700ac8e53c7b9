"""What monitoring.py is made of besides its metrics and its server: the engine behind it, clients, scraper, tables."""
