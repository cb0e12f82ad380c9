import { describe, expect, it } from 'vitest';
import { Dealer, Router } from 'zeromq';
import { received, SendQueue } from '../../src/comm/socket.js';
import { tempDir } from '../helpers/tempdir.js';

describe('a send queue', () => {
  it('keeps the order of the calls, and goes on behind a message that cannot be sent', async () => {
    const endpoint = `ipc://${tempDir()}/x`;
    const router = new Router({ mandatory: true, linger: 0 });
    await router.bind(endpoint);
    const dealer = new Dealer({ routingId: 'here', linger: 0 });
    dealer.connect(endpoint);
    await dealer.send('hello');
    await router.receive();

    const queue = new SendQueue(router);
    const sent = [
      queue.send(['here', '1']),
      queue.send(['nobody', '2']),
      ...Array.from({ length: 100 }, (_, i) => queue.send(['here', `${i + 3}`])),
    ];
    await expect(sent[1]).rejects.toThrow();
    const heard = received(dealer);
    for (const expected of [1, ...Array.from({ length: 100 }, (_, i) => i + 3)])
      expect(String((await heard.next()).value![0])).toBe(`${expected}`);
    const end = heard.next();
    dealer.close();
    expect((await end).done).toBe(true);
    router.close();
  });
});
