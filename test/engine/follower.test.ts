import { describe, expect, it } from 'vitest';
import { NodeServer } from '../../src/comm/nodes.js';
import { follow } from '../../src/engine/follower.js';
import { tempDir } from '../helpers/tempdir.js';

describe('a node whose node 0 is gone', () => {
  it('names the closed connection, not the silence that follows it', async () => {
    const endpoint = `ipc://${tempDir()}/nodes`;
    const server = await NodeServer.bind(endpoint, 'run', 2, null);
    const heard = server.messages();
    const ended = follow(
      {
        node: 1,
        nodes: 2,
        endpoint,
        address: null,
        keys: null,
        controls: /^$/,
        model: { kind: 'checkpoint', dir: 'none' },
        logDir: null,
        initTimeoutMs: 10_000,
        nodeTimeoutMs: 600, // silence is past it before a closed connection counts by itself
      },
      { host: 'b', hostId: 'b', pid: 1, version: '1', ranks: 1, device: 'cpu', devices: [], model: 'none' },
      {},
    );
    const refused = expect(ended).rejects.toThrow(/node 0: its connection closed/);
    expect((await heard.next()).value!.message.type).toBe('hello');
    await server.send(1, { type: 'welcome' });
    expect((await heard.next()).value!.message.type).toBe('heartbeat'); // it has read the welcome
    server.close();
    await refused;
  });
});
