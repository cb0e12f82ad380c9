import { describe, expect, it } from 'vitest';
import { NodeClient } from '../../src/comm/nodes.js';
import { Cluster } from '../../src/engine/cluster.js';
import { tempDir } from '../helpers/tempdir.js';

describe('node 0', () => {
  it('stays until a node that it refuses has heard why', async () => {
    const endpoint = `ipc://${tempDir()}/nodes`;
    const place = {
      nodes: 2,
      endpoint,
      address: null,
      keys: null,
      initTimeoutMs: 10_000,
      nodeTimeoutMs: 10_000,
    };
    const facts = {
      host: 'a',
      hostId: 'a',
      pid: 1,
      version: '1',
      ranks: 1,
      device: 'cpu' as const,
      devices: [],
    };
    const cluster = await Cluster.listen(place, 'run', { ...facts, model: 'ours' });
    const mismatch = expect(cluster.allPresent()).rejects.toThrow(/another model: theirs/);
    const node = new NodeClient(endpoint, 1, null, () => {});
    await node.send({ type: 'hello', node: 1, nodes: 2, ...facts, model: 'theirs' });
    expect(await node.receive()).toMatchObject({ type: 'refused', why: expect.stringContaining('theirs') });
    await mismatch;
    let closed = false;
    const closing = cluster.close(2).then(() => {
      closed = true;
    });
    await new Promise((done) => setTimeout(done, 200));
    expect(closed).toBe(false);
    const at = performance.now();
    await node.send({ type: 'leaving', why: 'refused' });
    await closing;
    expect(performance.now() - at).toBeLessThan(1000); // it was told, and did not just wait
    node.close();
  });
});
