"""Connections that end in unusual ways, over real TLS: none of them may end the server, and with it the operator."""

import json

import aiohttp

from finetune_api.progress import progress_path
from finetune_test_operator.report_server import TOKEN, Server, a_report


async def test_clients_that_close_while_the_server_closes_do_no_harm(server: Server) -> None:
    url, headers = server.url + progress_path("team", "bot"), {"Authorization": f"Bearer {TOKEN}"}
    connector = aiohttp.TCPConnector(ssl=server.tls, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        for sequence in range(1, 31):
            body = json.dumps(a_report(sequence))
            async with session.post(url, data=body, headers=headers) as answer:
                assert answer.status in (202, 429), "the server has ended"
