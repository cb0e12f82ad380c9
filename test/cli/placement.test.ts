import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { type PlacementFlags, readPlacement } from '../../src/cli/placement.js';
import { root } from '../helpers/fixture.js';

const NONE: PlacementFlags = { nnodes: null, nodeRank: null, masterAddr: null, masterPort: null };
const place = (env: Record<string, string>, flags: Partial<PlacementFlags> = {}) =>
  readPlacement({ ...NONE, ...flags }, env);

const TORCH = {
  RANK: '3',
  WORLD_SIZE: '4',
  LOCAL_RANK: '1',
  LOCAL_WORLD_SIZE: '2',
  MASTER_ADDR: 'h0',
  MASTER_PORT: '29400',
};
const SLURM = {
  SLURM_JOB_ID: '1007',
  SLURM_STEP_ID: '2',
  SLURM_PROCID: '1',
  SLURM_LOCALID: '0',
  SLURM_NODEID: '1',
  SLURM_STEP_NUM_TASKS: '2',
  SLURM_STEP_TASKS_PER_NODE: '1(x2)',
  SLURM_STEP_NODELIST: 'gpu[07-08]',
};
const MPI = {
  OMPI_COMM_WORLD_RANK: '1',
  OMPI_COMM_WORLD_SIZE: '2',
  OMPI_COMM_WORLD_LOCAL_RANK: '1',
  OMPI_COMM_WORLD_LOCAL_SIZE: '2',
  PMIX_NAMESPACE: '123/4',
};

describe('the place of a process', () => {
  it('is alone where nobody says anything', () => {
    expect(place({})).toMatchObject({ source: null, node: 0, nodes: 1, meeting: null });
  });

  it('comes from the flags, which win over every launcher', () => {
    const flags = { nnodes: 3, nodeRank: 2, masterAddr: '10.0.0.1' };
    expect(place({ ...TORCH, ...SLURM }, flags)).toEqual({
      source: 'the flags',
      node: 2,
      nodes: 3,
      meeting: { kind: 'tcp', host: '10.0.0.1', port: 29_500 },
      localRank: null,
      localNodes: 1,
    });
    expect(place(TORCH, { nnodes: 1 })).toMatchObject({ source: null, nodes: 1 });
  });

  it('comes from torchrun, beside whose store node 0 listens', () => {
    expect(place({ ...TORCH, TORCHELASTIC_USE_AGENT_STORE: 'True' })).toMatchObject({
      source: 'torchrun',
      node: 3,
      nodes: 4,
      meeting: { kind: 'tcp', host: 'h0', port: 29_401 },
      localRank: 1,
    });
    expect(place({ ...TORCH, RANK: '1', WORLD_SIZE: '2' }).meeting).toEqual({
      kind: 'ipc',
      name: 'torchrun-none-29400',
    });
    const { LOCAL_RANK: _, LOCAL_WORLD_SIZE: __, ...perNode } = TORCH;
    expect(place(perNode)).toMatchObject({ node: 3, nodes: 4, localRank: null });
  });

  it('comes from Slurm: a task per node leads its ranks, several per node are one each', () => {
    expect(place(SLURM)).toMatchObject({
      source: 'Slurm',
      node: 1,
      nodes: 2,
      meeting: { kind: 'tcp', host: 'gpu07', port: 29_509 },
      localRank: null,
    });
    const dense = {
      ...SLURM,
      SLURM_STEP_NUM_TASKS: '5',
      SLURM_STEP_TASKS_PER_NODE: '3,2',
      SLURM_LOCALID: '1',
      SLURM_PROCID: '4',
    };
    expect(place(dense)).toMatchObject({ node: 4, nodes: 5, localRank: 1, localNodes: 2 });
    const one = { ...SLURM, SLURM_STEP_TASKS_PER_NODE: '2', SLURM_NODEID: '0', SLURM_STEP_NODELIST: 'gpu07' };
    expect(place(one).meeting).toEqual({ kind: 'ipc', name: 'slurm-1007-2' });
    expect(place({ ...SLURM, SLURM_STEP_ID: '4294967290' }).source).toBe(null); // an interactive shell
    const { SLURM_STEP_ID: _, ...batch } = SLURM;
    expect(place(batch).source).toBe(null); // the batch script itself
  });

  it('comes from Open MPI, which names no host', () => {
    expect(place(MPI)).toMatchObject({
      source: 'Open MPI',
      node: 1,
      nodes: 2,
      meeting: { kind: 'ipc', name: 'mpi-123_4' },
      localRank: 1,
    });
    expect(place({ ...SLURM, ...MPI }).source).toBe('Open MPI'); // mpirun inside a Slurm job
    const spread = { ...MPI, OMPI_COMM_WORLD_LOCAL_RANK: '0', OMPI_COMM_WORLD_LOCAL_SIZE: '1' };
    expect(() => place(spread)).toThrow('give --master-addr');
    expect(place(spread, { masterAddr: 'h0' })).toMatchObject({ localRank: null, meeting: { host: 'h0' } });
  });

  it('comes from a LeaderWorkerSet, whose manifest runs the same command in every pod', () => {
    const env = { LWS_LEADER_ADDRESS: 'tp-run-0.tp-run.default', LWS_GROUP_SIZE: '2', LWS_WORKER_INDEX: '1' };
    expect(place(env)).toMatchObject({
      source: 'LeaderWorkerSet',
      node: 1,
      nodes: 2,
      meeting: { kind: 'tcp', host: 'tp-run-0.tp-run.default', port: 29_500 },
    });
    const manifest = readFileSync(join(root, 'launch/kubernetes.yaml'), 'utf8');
    expect(manifest).toMatch(/^apiVersion: leaderworkerset\.x-k8s\.io\/v1\nkind: LeaderWorkerSet$/m);
    // no template of its own for the leader: it runs the workers' command
    expect(manifest).not.toContain('leaderTemplate');
    expect(manifest).toContain('containerPort: 29500');
    expect(manifest).toContain('name: TP_RUN_KEY');
  });

  it.each([
    [{ ...TORCH, RANK: '4' }, {}, 'this is node 4 of 4'],
    [{ ...TORCH, RANK: 'x' }, {}, 'RANK is "x", not a whole number'],
    [{ ...SLURM, SLURM_NODEID: '' }, {}, 'SLURM_NODEID is ""'],
    [{ ...MPI, OMPI_COMM_WORLD_RANK: '5' }, {}, 'this is node 5 of 2'],
    [{}, { nodeRank: 1 }, '--node-rank without --nnodes'],
    [{}, { nnodes: 2, nodeRank: 0 }, '--nnodes 2 needs --master-addr'],
    [{}, { nnodes: 2, masterAddr: 'h' }, '--nnodes 2 needs --node-rank'],
    [{}, { nnodes: 2, nodeRank: 2, masterAddr: 'h' }, 'this is node 2 of 2'],
  ] as [Record<string, string>, Partial<PlacementFlags>, string][])(
    'is refused: %j %j',
    (env, flags, why) => {
      expect(() => place(env, flags)).toThrow(why);
    },
  );
});
