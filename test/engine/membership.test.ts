import { describe, expect, it } from 'vitest';
import { Membership, type NodeFacts } from '../../src/engine/membership.js';

const facts = (host: string, ranks: number, devices: number[] = []): NodeFacts => ({
  host,
  hostId: `${host} boot`,
  pid: 1,
  version: '1',
  ranks,
  device: devices.length ? 'cuda' : 'cpu',
  devices,
  model: 'm',
});

describe('the nodes of a run', () => {
  it('are missing until they have come, and again when they have gone', () => {
    const members = new Membership(3, facts('a', 1));
    expect(members.missing).toEqual([1, 2]);
    members.join(2, facts('c', 1));
    expect([members.missing, members.others.map(({ node }) => node)]).toEqual([[1], [2]]);
    members.get(2)!.present = false;
    expect(members.missing).toEqual([1, 2]);
  });

  it('are filled with ranks in order, whatever each has room for', () => {
    const members = new Membership(3, facts('a', 2, [0, 1]));
    members.join(2, facts('a', 2, [2, 3])); // a second node on the first host
    members.join(1, facts('b', 4, [0, 1, 2, 3]));
    expect(members.ranks).toBe(8);
    expect(Array.from({ length: 8 }, (_, rank) => members.of(rank).node)).toEqual([0, 0, 1, 1, 1, 1, 2, 2]);
    expect([0, 1, 2].map((node) => members.firstRank(node))).toEqual([0, 2, 6]);
    expect(members.devices(8)).toEqual([0, 1, 0, 1, 2, 3, 2, 3]);
    expect([1, 2, 4, 8].map((ranks) => members.hosts(ranks))).toEqual([1, 1, 2, 2]);
    expect([1, 8].map((ranks) => members.ownRanks(ranks))).toEqual([1, 2]);
  });
});
