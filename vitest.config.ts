import { defineConfig } from 'vitest/config';

// Real processes that are held to a time, or that take every core: one file at a time.
const ALONE = [
  'test/bench/run.test.ts',
  'test/e2e/{bench,faults,fuzz,runs,terminal}.test.ts',
  'test/engine/launcher.test.ts',
  'test/comm/collective.test.ts',
];

/** These need Slurm, Open MPI and network namespaces of their own: `npm run test:cluster`. */
const CLUSTER = ['test/e2e/{fault-table,launchers,nodes,recovery}.test.ts', 'test/cli/hostlist.test.ts'];

export default defineConfig({
  test: {
    globalSetup: ['test/helpers/build.ts'],
    testTimeout: 120_000,
    hookTimeout: 120_000,
    projects: [
      {
        extends: true,
        test: {
          name: 'together',
          include: ['test/**/*.test.ts'],
          exclude: [...ALONE, ...CLUSTER],
          maxWorkers: 2,
          sequence: { groupOrder: 0 },
        },
      },
      { extends: true, test: { name: 'alone', include: ALONE, maxWorkers: 1, sequence: { groupOrder: 1 } } },
      {
        extends: true,
        test: { name: 'cluster', include: CLUSTER, maxWorkers: 1, sequence: { groupOrder: 2 } },
      },
    ],
  },
});
