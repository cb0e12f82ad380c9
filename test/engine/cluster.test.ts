import { afterEach, describe, expect, it } from 'vitest';
import { NodeClient } from '../../src/comm/nodes.js';
import { Cluster } from '../../src/engine/cluster.js';
import { sleep } from '../helpers/running.js';
import { tempDir } from '../helpers/tempdir.js';

const about = { host: 'a', hostId: 'a', pid: 1, version: '1', ranks: 1, device: 'cpu' as const, devices: [] };

let node: NodeClient;
afterEach(() => node.close());

/** Node 0 of two, and a client in the place of node 1 that has said hello. */
async function meet({ model, nodeTimeoutMs }: { model: string; nodeTimeoutMs: number }): Promise<Cluster> {
  const endpoint = `ipc://${tempDir()}/nodes`;
  const place = { nodes: 2, endpoint, address: null, keys: null, initTimeoutMs: 10_000, nodeTimeoutMs };
  const cluster = await Cluster.listen(place, 'run', { ...about, model: 'ours' });
  node = new NodeClient(endpoint, 1, null, () => {});
  await node.send({ type: 'hello', node: 1, nodes: 2, ...about, model });
  return cluster;
}

describe('node 0', () => {
  it('stays until a node that it refuses has heard why', async () => {
    const cluster = await meet({ model: 'theirs', nodeTimeoutMs: 10_000 });
    await expect(cluster.allPresent()).rejects.toThrow(/another model: theirs/);
    expect(await node.receive()).toMatchObject({ type: 'refused', why: expect.stringContaining('theirs') });
    let closed = false;
    const closing = cluster.close(2).then(() => {
      closed = true;
    });
    await sleep(200);
    expect(closed).toBe(false);
    const at = performance.now();
    await node.send({ type: 'leaving', why: 'refused' });
    await closing;
    expect(performance.now() - at).toBeLessThan(1000); // it was told, and did not just wait
  });

  it('names the closed connection of a node, not the silence that follows it', async () => {
    // silence is past it at the second heartbeat that finds no connection
    const cluster = await meet({ model: 'ours', nodeTimeoutMs: 600 });
    await cluster.allPresent();
    const lost = new Promise<string>((resolve) => {
      cluster.onLost = ({ message }, ranks) => resolve(`${ranks}: ${message}`);
    });
    cluster.start({ launch: 'a', control: 'ipc://none', ranks: 2, keys: null }, () => {});
    node.close();
    expect(await lost).toMatch(/^1: TP_NODE_LOST: node 1 on a: its connection closed/);
    await cluster.close(4);
  });
});
